"""A bundle on a page in the browser of this machine: its kept tokens, its answers, and its unpruned twin beside it."""
