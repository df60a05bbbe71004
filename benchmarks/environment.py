"""Import this before torch: benchmarks then run in the environment that the command `hgrn2` makes for itself."""

from hgrn2_command import sleep_while_waiting

sleep_while_waiting()
