"""`vila2-fast prompts`: list the named prompts."""

import json

import rich_click as click


@click.command()
@click.option("--prompt-file", type=click.Path(dir_okay=False), help="Prompts of your own (TOML or YAML).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prompts(prompt_file: str | None, as_json: bool) -> None:
    """List the prompts that `recaption --prompt NAME` knows, with their wordings.

    A prompt file holds tables like `[streets] texts = ["Describe the street signs."]`.
    """
    from vila2.recaption.prompts import DEFAULT_PROMPT, load_prompts

    known = load_prompts(prompt_file)
    if as_json:
        click.echo(
            json.dumps({name: list(prompt.texts) for name, prompt in known.items()}, ensure_ascii=False)
        )
        return
    for name, prompt in known.items():
        click.echo(name + (" (the default)" if name == DEFAULT_PROMPT else ""))
        for text in prompt.texts:
            click.echo(f"  - {text}")
