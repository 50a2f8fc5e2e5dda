"""From records to shards: on all cores, resumable, and with the same bytes for any number of processes.

Each fast path has a slow reference, whose results it must equal:

=======================  ==========================================  =============================================
fast path                the reference                               the test that compares the two
=======================  ==========================================  =============================================
``fast_records.py``     ``steer.records.from_json``                 ``tests/unit/test_fast_records.py``
``skeletons.py``             ``steer.templates.Template.render``         ``tests/unit/test_build.py``
``builder.py``           ``data.views.build_documents``              ``tests/unit/test_build.py``
``pool.py``              a single process                            ``tests/unit/test_preprocess.py``
=======================  ==========================================  =============================================
"""
