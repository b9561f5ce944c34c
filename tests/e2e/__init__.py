"""The whole service: posted over REST, kept in Valkey, run on Ray, written to a store."""
