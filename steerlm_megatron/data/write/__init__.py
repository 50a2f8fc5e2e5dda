"""Records → shards, on all cores, resumable, byte for byte the same whatever the number of processes.

Each fast path has a slow one that is the truth, and that it must equal:

=======================  ==========================================  =============================================
fast path                the truth                                   the test that holds them together
=======================  ==========================================  =============================================
``fast_records.py``     ``steer.records.from_json``                 ``tests/unit/test_fast_records.py``
``skeletons.py``             ``steer.templates.Template.render``         ``tests/unit/test_build.py``
``builder.py``           ``data.views.build_documents``              ``tests/unit/test_build.py``
``pool.py``              one process after the other                 ``tests/unit/test_preprocess.py``
=======================  ==========================================  =============================================
"""
