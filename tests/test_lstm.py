"""lstm: the battery, and what tests/check_recurrence.py asks of a recurrence."""

from check_op import op_tests
from check_recurrence import battery, recurrence_tests

globals().update(op_tests(battery("lstm")) | recurrence_tests("lstm"))
