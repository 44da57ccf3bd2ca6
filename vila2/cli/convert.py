"""`vila2-fast convert`: a checkpoint with pickled weights becomes one with safetensors."""

import rich_click as click


@click.command()
@click.argument("checkpoint")
@click.argument("new")
def convert(checkpoint: str, new: str) -> None:
    """Copy CHECKPOINT to the new folder NEW with safetensors in place of pickled weights.

    Pickles can run code when they are loaded; only tensors are read here, and anything else is refused.

    \b
    vila2-fast convert old-vila/ new-vila/
    """
    from vila2.model.convert import convert_checkpoint

    for path in convert_checkpoint(checkpoint, new):
        click.echo(str(path))
