"""Webhooks: who is told of what, the durable queue that it is sent from, and where it may go."""
