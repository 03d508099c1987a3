"""Many requests, computed several at a time by llama-server in this process: `llama-flash batch`, `complete_many`.

    requests.jsonl  ->  requests.py  ->  asking.py (clients)  ->  engine.py (llama-server)
                        answers.jsonl  <-  answers.py  <-  job.py

What a request is and what is wrong with one is in requests.py, what is there already in answers.py; advice.py chooses
context and parallelism. Nothing here schedules: asking.py keeps a few more requests under way than the server has
sequences, and the server does the rest. many.py is the same for Python, without files.
"""
