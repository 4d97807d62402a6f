"""What stages hand on: typed results, the files they point to, and the cache that finds them again.

`record` has the base classes, `models` the results of every stage, `store` the files, `rows` the
index of what was made user by user, `stage` the decorator that makes a function a cached stage.
"""
