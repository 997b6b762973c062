# SPDX-License-Identifier: Apache-2.0
"""The preset DEFLATE dictionary of tokens, fixed by version 1 of the protocol: both ends must hold the same bytes.

Common claims, label keys and values of Kubernetes; the likeliest stand last, where a reference to them is shortest.
A change of a single byte here is another version of the protocol.
"""

TOKEN_DICTIONARY = (
    b"security.istio.io/tlsMode service.istio.io/canonical-name service.istio.io/canonical-revision "
    b"topology.kubernetes.io/region topology.kubernetes.io/zone "
    b"pod-security.kubernetes.io/enforce privileged baseline restricted "
    b"kustomize.toolkit.fluxcd.io/name kustomize.toolkit.fluxcd.io/namespace argocd.argoproj.io/instance "
    b"statefulset.kubernetes.io/pod-name apps.kubernetes.io/pod-index controller-revision-hash "
    b"job-name batch.kubernetes.io/job-name batch.kubernetes.io/controller-uid controller-uid "
    b"production staging development environment system platform monitoring prometheus grafana ingress-nginx "
    b"database postgres mysql redis kafka rabbitmq elasticsearch cache queue worker scheduler gateway "
    b"frontend backend server client service controller operator webhook metrics public private internal "
    b'"helm.sh/chart":"app.kubernetes.io/managed-by":"Helm","app.kubernetes.io/version":"v1.0.0",'
    b'"app.kubernetes.io/part-of":"app.kubernetes.io/component":"app.kubernetes.io/instance":"release-name",'
    b'"app.kubernetes.io/name":"pod-template-generation":"1","pod-template-hash":"'
    b'"team":"tier":"env":"prod","role":"release":"stable","version":"v1","component":"k8s-app":"kube-dns","app":"'
    b'"ports":[["http",80,6],["https",443,6],["metrics",9090,6],["dns",53,17],["dns-tcp",53,6],["http",8080,6]]'
    b'"fd00::","10.244.","192.168.","172.16.'
    b'"nsl":{"kubernetes.io/metadata.name":"kube-system"},{"kubernetes.io/metadata.name":"default"}}'
    b'{"iss":"cluster.local","sub":"ns/kube-system/sa/ns/default/sa/default","pod":"","node":"node-1","ips":["10.'
    b'"],"iat":17,"exp":17,"nonce":"","epk":"","labels":{"app":""},"nsl":{"kubernetes.io/metadata.name":""}}'
)
