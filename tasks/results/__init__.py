"""What stages hand on: typed results (`models`), their files (`store`), users one by one (`rows`).

`stage` makes a function a cached stage, `run` is what a whole run leaves.
"""
