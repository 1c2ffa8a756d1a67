"""How fast, beside what: ``python -m bench``. README.md has the method and the figures."""
