"""The benchmark under seeded faults: `python -m tests.faults --kills 100 --seed 0`."""
