"""Load what workers need, once, in the process that forks them; what is loaded there is never collected."""

from tutelage.loading import loading

with loading():
    import tutelage.run  # noqa: F401 - for those who are forked
