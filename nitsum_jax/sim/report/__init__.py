"""HTML reports of runs: one file, nothing loaded from anywhere.

`runs.py` reads the folders of runs, `spans.py` tells the layouts over time from the logs, `figures.py` and `compare.py`
draw, `style.py` says how, and `page.py` puts it all into `template.html`.
"""
