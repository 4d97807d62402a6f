"""Synthetic users whose taste is known, so that what personalisation can reach is known too.

Themes stand for items of one sort. Archetypes are ways of answering: each has a value per theme. A
user mixes two archetypes, so what one user needs is spread over several anchors, which is what a
merged LoRA has to find again. LaMP-1, 2M, 3, 4 and 5 differ in how a value shows in texts and
answers (`family`); population, posterior and optimum are the same. See docs/benchmark.md.

    write_synthetic(Path("data"), "LaMP-2M", SyntheticOptions(), seed=0)

writes the three user files that tasks/lamp/formats.py reads, and truth.json beside them.
"""

from tasks.lamp.synthetic.world import FAMILIES, ROLE_FILES, TRUTH_FILE, World, write_synthetic

__all__ = ["FAMILIES", "ROLE_FILES", "TRUTH_FILE", "World", "write_synthetic"]
