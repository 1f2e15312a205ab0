"""The build puts configs/, whose only copy is at the top of the repository, into the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ to lorafusion/configs of a wheel; an editable install reads the checkout's."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for path in sorted(Path("configs").rglob("*.*")):
                target = Path(self.build_lib, "lorafusion", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
