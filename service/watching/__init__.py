"""What is seen of a deployment: metrics, logs, and the schedulers that are alive."""
