"""The HTTP edge: REST under ``/v1``. Decides nothing; never imports Ray."""
