"""What can go wrong, as values: each error is one sentence, says where it applies and, if possible, what to do.

Exit codes: 1 our bug, 2 usage or recipe, 3 input refused, 4 resources or lock, 5 quality gate, 6 environment.
"""


class CompressError(Exception):
    """The root: one sentence, `where` it applies (file, `file:line:column`, tensor) and, as `hint`, what to do."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(CompressError):
    """A command line or call that makes no sense."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be run as written. `excerpt` is the source line with a caret below it, if known."""

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, excerpt: str | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.excerpt = excerpt


class InputError(CompressError):
    """A model, dataset or artifact that is refused: broken, unsafe, gated or not understood."""

    exit_code = 3


class ArtifactError(InputError):
    """An artifact whose files, headers or values contradict each other or its manifest."""


class ResourceError(CompressError):
    """Memory, disk or a lock: the run can be resumed once there is room."""

    exit_code = 4


class LockError(ResourceError):
    """Somebody else works on this output."""


class GateError(CompressError):
    """The artifact was written but misses the recipe's gate."""

    exit_code = 5


class EnvironmentRefused(CompressError):
    """The machine lacks something: a device, a kernel, a package of ours."""

    exit_code = 6
