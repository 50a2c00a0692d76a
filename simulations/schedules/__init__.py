"""Random schedules of faults for a trunk and its clients, and a checker with a model of both."""
