"""No module imports itself by a detour, not even for types alone."""

import grimp
import networkx


def test_no_import_cycles():
    packages = ("fedsplit", "strategies", "simulations")
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=False, cache_dir=None)
    imports = networkx.DiGraph(
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        # What a package offers in its __init__ comes from the modules below it.
        if not importer.startswith(f"{imported}.") and not imported.startswith(f"{importer}.")
    )
    cycles = [sorted(each) for each in networkx.strongly_connected_components(imports)]
    assert not [cycle for cycle in cycles if len(cycle) > 1]
