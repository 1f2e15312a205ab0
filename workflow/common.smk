# What the steps of a suite are in Snakemake's words.
@contextmanager
def reported():
    """A user's mistakes within it are told without a traceback."""
    try:
        yield
    except UserError as error:
        raise WorkflowError(f"error: {error}") from None


with reported():
    SITE = read_site()
    SUITE = dag_of_config(config)
    FAILED = {} if is_driven() else failures_of(SUITE)
AGAIN = accidents(FAILED) if config["again"] else []


def braced(text):
    """A text as it stands: Snakemake fills in what stands in braces."""
    return text.replace("{", "{{").replace("}", "}}")


def names_of(kind):
    """A pattern of the names of a kind's steps."""
    return "|".join(map(re.escape, SUITE.kinds[kind]))


def of_step(kind, get):
    """A function of a rule's wildcards, by a function of the step that they stand for."""
    steps = SUITE.kinds[kind]
    return lambda wildcards: get(steps[wildcards.get("name", "")])


def inputs_of(kind):
    """The inputs. A step that another driver made from other settings, of which Snakemake has no record, is forced, and
    so is one that is to be tried again."""

    def inputs(step):
        if step.is_stale or step in AGAIN:
            workflow.dag.forcefiles.add(str(step.path))
        return [str(source.path) for source in step.inputs]

    return of_step(kind, inputs)


@cache
def groups():
    """The jobs that steps share on Slurm."""
    with reported():
        return share_jobs(workflow, SUITE, SITE)


def group_of(kind):
    """The job that a step shares; None for a kind that is made where the workflow runs."""
    return None if kind.quick else of_step(kind, lambda step: groups().get(step))


def outputs_of(kind):
    """The outputs by name, those that the report shows marked."""
    named = {"main": kind.outputs[0]} | {
        f"also_{i}": path for i, path in enumerate(kind.outputs[1:])
    }
    marked = {"key": f"{SUITE.folder}/{kind.key}"}
    for name, pattern in named.items():
        path = f"{SUITE.folder}/{pattern}"
        if pattern in kind.labels:
            caption = f"{workflow.basedir}/workflow/report/{kind.caption}"
            labels = {"content": kind.labels[pattern]}
            path = report(path, caption=caption, category=kind.category, labels=labels)
        marked[name] = directory(path) if kind.directory else path
    return marked


def threads_of(kind):
    """The threads of a step's own process. Snakemake hands them to OpenMP: runs share their work among processes of one
    thread each, with sums that do not depend on the number of cores."""
    return of_step(kind, lambda step: step.resources.cpus if kind.fresh else 1)


def resources_of(kind):
    """What Slurm is asked for, here and not in the profile, of which `--default-resources` of a command line would
    replace all. `device` is one on each machine (profiles), so that nothing disturbs a run's clock.
    """
    if kind.quick:
        return {"mpi": ""}
    requests = {
        name: request_of(step.resources, SITE)
        for name, step in SUITE.kinds[kind].items()
    }
    first = next(iter(requests.values()))
    asked = [
        key for key in first if any(asks[key] is not None for asks in requests.values())
    ]
    return {
        key: lambda wildcards, key=key: requests[wildcards.get("name", "")][key]
        for key in asked
    } | {"device": of_step(kind, lambda step: int(step.resources.exclusive))}


DRIVER = ExitStack()


onstart:
    with reported():
        begin(SUITE, DRIVER, submission_of(workflow), workflow.local_exec)


# The report needs the finished run, so it is no rule. Where nothing was to be done, it is there already. A target such
# as `kernels` can succeed before the rest of the suite was run: then there is no report yet.
onsuccess:
    if all(path.exists() for step in SUITE.targets["all"] for path in step.outputs):
        if write_report(SUITE, workflow.main_snakefile):
            print(f"report: {SUITE.folder}/report.html")
    with reported():
        DRIVER.close()
    again = again_command(SUITE, slurm=not workflow.local_exec)
    failed = statement(failures_of(SUITE), again)
    if failed and not is_driven():  # who drives this says it itself
        raise WorkflowError(f"error: {UserError(failed)}")


onerror:
    with reported():
        DRIVER.close()
    begun = unmade(SUITE.of_target("all"))
    if begun:
        print(f"error: {UserError(*begun)}", file=sys.stderr)
