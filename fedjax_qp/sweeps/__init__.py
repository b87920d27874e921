"""Sweeps: many configurations, several seeds each, on all cores or many machines.

space.py      the sweep file                       search.py     grid, random points, Optuna
trials.py     the sweep's folder                   stopping.py   the median rule
tasks.py      what a worker does                   schedule.py   Dask
results.py    tables                               figures.py    figures
live.py       the table on the screen              run.py        all of it together

Read `space` first.
"""
