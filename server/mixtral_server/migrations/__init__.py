"""Alembic revisions, in order, in versions/. Run through database.py alone."""
