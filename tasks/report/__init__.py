"""What people look at: the table of a terminal and the page report.html of a run."""
