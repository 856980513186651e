"""What a browser sends to the stethoscope's page, without a browser."""

import json
import secrets

import httpx


class Client:
    """One browser: its cookies, and one opening of the page."""

    def __init__(self, address, login=None):
        self.http = httpx.Client(base_url=address, timeout=120)
        self.http.get("/")
        if login:
            assert self.log_in(*login).status_code == 200
        self.session = secrets.token_hex(6)
        config = self.http.get("/config").json()
        self.parts = {part["id"]: part for part in config["components"]}
        self.events = {event["api_name"]: event for event in config["dependencies"]}
        self.values = {id: part["props"].get("value") for id, part in self.parts.items()}

    def log_in(self, user, password):
        return self.http.post("/login", data={"username": user, "password": password})

    def named(self, elem_id):
        """The id of the component that has this name in the page."""
        return next(i for i, part in self.parts.items() if part["props"].get("elem_id") == elem_id)

    def send(self, event, event_data=None, **given):
        """{elem_id: new value} of an event, or the message that it ends in. given: values of
        components, by elem_id."""
        found = self.events[event]
        values = self.values | {self.named(name): value for name, value in given.items()}
        body = {
            "data": [values[id] for id in found["inputs"]],
            "fn_index": found["id"],
            "session_hash": self.session,
            "event_data": event_data,
            "trigger_id": found["targets"][0][0],
        }
        joined = self.http.post("/gradio_api/queue/join", json=body)
        joined.raise_for_status()
        event_id = joined.json()["event_id"]
        query = {"session_hash": self.session}
        with self.http.stream("GET", "/gradio_api/queue/data", params=query) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                is_end = message.get("msg") == "process_completed"
                if is_end and message["event_id"] == event_id:
                    return self._taken(found, message["output"])
        raise AssertionError("the stream ended before the event did")

    def _taken(self, event, output):
        if "error" in output:
            return output["error"]
        new = {}
        for id, value in zip(event["outputs"], output["data"], strict=True):
            is_update = isinstance(value, dict) and value.get("__type__") == "update"
            if is_update:
                value = value.get("value")
            if not is_update or value is not None:
                self.values[id] = value
            new[self.parts[id]["props"].get("elem_id")] = value
        return new

    def pick(self, example=0):
        """Choose a drawn picture."""
        return self.send("pick_example", {"index": example, "value": None, "selected": True})

    def ask(self, question="Describe the image."):
        """The answer, or a message."""
        new = self.send("answer_question", question=question)
        return new if isinstance(new, str) else new["answer"]
