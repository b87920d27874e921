"""Sweeps: many configurations, several seeds each, on all cores or many machines; then the best of each compared.

space.py      the sweep file                       search.py     Optuna's samplers
trials.py     the sweep's folder, Optuna's study   worker.py     what a worker does, Optuna's pruners
schedule.py   Dask                                 results.py    tables, figures, the comparison
run.py        all of it together

Read `space` first.
"""
