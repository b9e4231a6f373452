// The only JavaScript of this edge. What runs as js_content has read the request's body, which `auth_request` alone never does; from the
// named location on, the body is at hand for the question to the coordinator and for the node. No JSON is read here.

function with_body(r) {
    r.internalRedirect('@node');
}

export default { with_body };
