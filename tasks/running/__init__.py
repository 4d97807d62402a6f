"""Where jobs run (`runner`, `ray_runner`), how many at once (`slots`), how far they are."""
