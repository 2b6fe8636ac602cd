"""Quality of the reconstructions: RLSD beside other samplers, on the same prior, measurements and evaluations.

    python -m rlsd.bench.quality --data FOLDER --work FOLDER

`settings` is the table of all settings; `sample` draws and stores particles; `figures` measures them; `report` writes
QUALITY.md, the pictures and the result rows.
"""
