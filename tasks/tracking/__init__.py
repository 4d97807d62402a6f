"""The run in MLflow: what is logged (`runs`), kept until MLflow took it (`spool`, `replay`).

    python -m tasks.tracking [--store .mta/store]

logs what waits in `spool` beside the store, one line per run. Exit code 0: nothing waits any more;
1: something does; 2: there is no MLflow to ask.
"""
