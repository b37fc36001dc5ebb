"""The commands of ``python -m megatron_evomoe``, one module each, named for its command.

A command module has two functions:

* ``add_arguments(parser)`` adds the command's flags.
* ``run(args) -> int`` does the work and returns the exit status. An error meant for users is raised as a
  `megatron_evomoe.errors.UserError`, which `megatron_evomoe.cli` prints.

`cli.COMMANDS` is the table of all commands.
"""
