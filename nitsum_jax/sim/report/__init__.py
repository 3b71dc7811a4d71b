"""HTML reports of runs: one file, nothing loaded from anywhere.

`runs.py` reads the folders of runs, `spans.py` finds the layouts over time in the logs, `figures.py` and `compare.py`
draw, `style.py` says how, and `page.py` puts it all into `template.html`.
"""
