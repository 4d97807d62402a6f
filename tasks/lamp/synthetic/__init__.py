"""Synthetic users whose taste is known, and so the best that personalisation can reach.

A theme is a sort of items. An archetype is a way of answering: it has a value per theme. A user
mixes two archetypes. So several anchors each know a part of the user, and a merged LoRA has to find
these parts. LaMP-1, 2M, 3, 4 and 5 differ in how a value shows in texts and answers (`family`);
population, posterior and optimum are the same. See docs/worlds.md.

    World("LaMP-2M", SyntheticOptions(), seed=0).write(Path("data"))
"""

from tasks.lamp.synthetic.world import FAMILIES, User, World

__all__ = ["FAMILIES", "User", "World"]
