"""Run by Alembic from `holdfast.state.schema.migrate`, which owns the connection and the transaction."""

from alembic import context

from holdfast.state.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
