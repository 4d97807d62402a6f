"""What people look at: the table of a terminal (`table`), and the page report.html of a run.

`data` gathers one dict from a run's results (`chosen`: what merging chose; `answers`: what methods
said); `html` makes the page of it, with `pictures`, `differences` and `words` for its sections,
`charts` for matplotlib and `page` for tags.
"""
