"""An explorer of the real code: all schedules of a few processes, within a bound.

``python -m tests.explorer`` runs it; ``explorer.py`` says how it works, ``memory.py`` what is
simulated, ``scenarios.py`` what is tried, and ``mutants.py`` which mistakes it must find.
"""
