"""Outboxes that follow the transactions of a database: `django` and `sqlalchemy`, each an optional extra."""
