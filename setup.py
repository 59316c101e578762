"Package metadata, all of it read from settings.ini: each NAME_requirements there is an extra called NAME."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = HERE / "README.md"

extras = {key.removesuffix("_requirements"): settings[key].split()
          for key in settings if key.endswith("_requirements")}
extras["all"] = sorted({requirement for name, names in extras.items() if name != "peers" for requirement in names})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else settings["description"],
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    python_requires=f'>={settings["min_python"]}',
    packages=["textgen"],
    package_data={"textgen": ["recipes/*.yaml"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": ["textgen=textgen._modidx:d"],   # lets nbdev link `names` in prose to their pages
    },
)
