"""New users of a finished run: `mta personalise`, `mta ask`; begin at `personaliser.py`."""
