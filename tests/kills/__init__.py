"""Real kills and real exceptions, at every bytecode and in machine code; ``python -m tests.kills``.

tracing        acts before the k-th bytecode of protocol code
stage          a table, what is done while dying, and the books of a run
deaths         SIGKILL at every bytecode: of the victim, its repairer, and the repairer's
instructions   SIGKILL between two machine instructions, by ptrace
interrupts     KeyboardInterrupt and PyThreadState_SetAsyncExc at every bytecode
public         the same, of what an application calls
"""
