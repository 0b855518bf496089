{{- define "runvol.name" -}}
{{ .Release.Name }}
{{- end }}
{{- define "runvol.labels" -}}
app.kubernetes.io/name: runvol
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
{{- define "runvol.selector" -}}
app.kubernetes.io/name: runvol
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "runvol.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- define "runvol.sidecar" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}
{{/* Settings as TOML: a section a table, keys as JSON writes them, which TOML reads. */}}
{{- define "runvol.toml" -}}
{{- range $section, $keys := . }}
[{{ $section }}]
{{- range $key, $value := $keys }}
{{ $key }} = {{ $value | toJson }}
{{- end }}
{{- end }}
{{- end }}
{{/* Of the root and a driver's name: not empty if this release has that driver, or else nobody would serve its classes. */}}
{{- define "runvol.served" -}}
{{- if ternary (first .).Values.drivers.nodes (first .).Values.drivers.nfs (eq (last .) "csi.runvol.io") }}yes{{ end }}
{{- end }}
{{/* Not empty where the snapshot-controller runs: without the API it would only end again and again. */}}
{{- define "runvol.snapshotController" -}}
{{- if and .Values.snapshots.controller (or (ne (toString .Values.snapshots.enabled) "auto") (include "runvol.snapshots" .)) }}yes{{ end }}
{{- end }}
{{/* Not empty where the snapshotters run: as said, or where the cluster has the API. */}}
{{- define "runvol.snapshots" -}}
{{- if eq (toString .Values.snapshots.enabled) "auto" }}
{{- if .Capabilities.APIVersions.Has "snapshot.storage.k8s.io/v1" }}yes{{ end }}
{{- else if .Values.snapshots.enabled }}yes{{ end }}
{{- end }}
