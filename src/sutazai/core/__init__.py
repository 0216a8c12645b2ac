"""The words of the project as plain values: no I/O, no event loop, no clock, standard library only."""
