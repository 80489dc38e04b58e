export const message = 'first'
