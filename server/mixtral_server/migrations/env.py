"""Run by Alembic. Migrations always run on the connection that database.py hands over: it holds the lock against other replicas."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
