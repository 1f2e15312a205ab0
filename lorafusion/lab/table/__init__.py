"""What is measured and what it means: timers, environment, the measurement table and its statistics.

`table` defines the one table that every number of the suite ends in; `statistics` says what repeats amount to.
"""
