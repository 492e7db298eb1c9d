"""The functions of worker.py by name, for the launcher, which starts them without importing torch."""

MEASURE = "bagualu.launch.machine.worker:measure"
MEASURE_QUICKLY = "bagualu.launch.machine.worker:measure_quickly"
CHECK = "bagualu.launch.machine.worker:check"
