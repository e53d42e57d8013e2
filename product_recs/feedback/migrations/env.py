"""Alembic runs this file to bring a feedback store to the newest version; `product_recs.feedback.connection.migrate`
hands it an open transaction."""
from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
