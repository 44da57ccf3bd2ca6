"""`vila2-fast completion SHELL`: print the completion script."""

import rich_click as click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash: eval "$(vila2-fast completion bash)"     in ~/.bashrc
    zsh:  eval "$(vila2-fast completion zsh)"      in ~/.zshrc
    fish: vila2-fast completion fish > ~/.config/fish/completions/vila2-fast.fish
    """
    from click.shell_completion import get_completion_class

    from vila2.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None  # click has the three
    click.echo(kind(cli, {}, "vila2-fast", "_VILA2_FAST_COMPLETE").source())
