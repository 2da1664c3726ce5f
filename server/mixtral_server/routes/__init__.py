"""The routes: one file per wire. What a route may use is service.py; the table of all of them is app.py's."""
