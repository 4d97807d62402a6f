"""LaMP's own files from the benchmark's site or a mirror, into a cache; docs/data.md.

    folder = official_files("LaMP-3", LampOptions(), say=print, progress=lambda *_: None)

gives the folder that tasks/lamp/formats.py reads.
"""

from tasks.lamp.download.site import FOLDERS, MANIFEST, official_files

__all__ = ["FOLDERS", "MANIFEST", "official_files"]
