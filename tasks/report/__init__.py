"""What people look at: the table of a terminal (`table`), and the page report.html of a run.

`data` gathers `page_data.ReportData` from a run's results (`chosen`: what merging chose; `answers`:
what methods said; `since`: what is another than last time); `html` puts it into `templates`;
`charts` draws with matplotlib.
"""
