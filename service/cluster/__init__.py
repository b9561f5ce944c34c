"""Tasks on Ray: which goes where and when, the process that talks to Ray, and an end to all that was started."""
